"""`python -m kara_hf` is the `kara-hf` command."""

from .cli.app import app

if __name__ == "__main__":
    app(prog_name="kara-hf")
