"""Terminal output: lines, tables, and numbers with units."""
