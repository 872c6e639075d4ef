"""Scorers equal to the official tools to the last digit, as plain functions on answers and annotations."""
