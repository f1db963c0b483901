"""A study of claims: declared before it is run, decided by one exact test a claim."""
