"""What the report shows of one run: an analysis a file, each `Run -> Section`."""
