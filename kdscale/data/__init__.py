"""Text, labelled texts or images in, batches of rows out: a pure function of (corpus, config, batch number)."""
