"""Text files and a tokenizer in, packed TokenBatches out: a pure function of (corpus, config, batch number)."""
