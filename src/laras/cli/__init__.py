"""One module a verb: parse, call the pipeline, print."""
