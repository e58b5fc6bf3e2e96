"""The evaluation kit: methods answer the same examples at equal resident bytes, beside controls and an oracle."""
