"""What engines record of themselves, read from outside: found, decoded, and put on a time line."""
