"""The command line: flags become a request, one call does the work, one module prints."""
