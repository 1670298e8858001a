"""Tools that analyze, plan, test and export runs."""
