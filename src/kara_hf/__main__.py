"""`python -m kara_hf` is the `kara-hf` command."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="kara-hf")
