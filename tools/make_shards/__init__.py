"""Documents of any source as shards of ours."""
