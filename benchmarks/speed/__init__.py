"""How fast caches decode and what they hold, on a CPU."""
