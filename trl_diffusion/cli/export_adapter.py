"""Write a LoRA adapter as PEFT would have written it on the hub's original code, for those who load that.

    trl-diffusion export-adapter outputs/llada_8b_gsm8k_agrpo outputs/for_the_hubs_code

`--reverse` turns an adapter that was trained on the hub's code into one for this library.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from trl_diffusion.adapters.renaming import export_adapter, import_adapter


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the adapter that the arguments name in the other form."""
    parser = ArgumentParser(
        "trl-diffusion export-adapter", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="adapter on the Hub or in a folder")
    parser.add_argument("output", help="folder to write to")
    parser.add_argument("--base", help="the base model, if the adapter's config names none, or one that has moved")
    parser.add_argument("--reverse", action="store_true", help="from the hub's names to this library's")
    args = parser.parse_args(arguments)
    written = (import_adapter if args.reverse else export_adapter)(args.adapter, args.output, args.base)
    print(f"Adapter: {written}")


if __name__ == "__main__":
    main()
