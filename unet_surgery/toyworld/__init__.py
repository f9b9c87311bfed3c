"""The toy world: small captioned pictures made on the fly, and a checker that reads them back. No torch."""
