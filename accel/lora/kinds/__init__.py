"""The kinds of change that trainers write for one linear."""
