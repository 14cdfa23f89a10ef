"""From documents to batches: `sources` (documents), `prepare` (token shards), `loader` (batches)."""
