"""What finished runs say together: rows, tests over seeds, comparisons."""
