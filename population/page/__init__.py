"""The population page: HTML over HTTP, served by Ray Serve."""
