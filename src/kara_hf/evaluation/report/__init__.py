"""Reporting: statistics, summaries, figures and the page that shows them."""
