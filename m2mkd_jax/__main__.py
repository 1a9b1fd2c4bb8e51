"""python -m m2mkd_jax: says which commands there are."""

import sys

import m2mkd_jax

VERSION = f"m2mkd_jax {m2mkd_jax.__version__}"
COMMANDS = f"""{VERSION}: module-to-module knowledge distillation (arXiv 2402.16918)

  m2mkd          train, distil and evaluate: the phases of a config
  m2mkd-convert  torch or safetensors weights to this package's, and back
  m2mkd-predict  the likeliest classes of images
  m2mkd-export   a network as a StableHLO or ONNX file
  m2mkd-push     a network to the Hugging Face hub
  m2mkd-report   what runs gave, as one page

Each has --help, and runs as python -m m2mkd_jax.main, .convert, .predict ... too."""


def main() -> None:
    """Prints the commands, or for --version the version."""
    print(VERSION if "--version" in sys.argv[1:] else COMMANDS)


if __name__ == "__main__":
    main()
