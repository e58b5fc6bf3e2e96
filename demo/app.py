"""`python demo/app.py` is `kara-hf demo`, from a checkout; options are the same, `--help` lists them."""

import sys

from kara_hf.cli.app import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]])
