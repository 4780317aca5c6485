"""What people see in a terminal: lines, tables, and numbers with units."""
