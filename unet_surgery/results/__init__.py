"""What came of it all: the files that the commands leave, read back, compared and shown on one page."""
