"""From the text of files to Arrow blocks, once for each corpus."""
