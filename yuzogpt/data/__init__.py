"""From text to rows of tokens: corpora -> prepare -> blocks -> batches."""
