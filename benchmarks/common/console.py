"""Where benchmarks print."""

from rich.console import Console

console = Console()
