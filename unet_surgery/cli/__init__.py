"""The command line: parse, call one function of the API, show what it returned."""
