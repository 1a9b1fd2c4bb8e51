"""Prints the likeliest classes of each image, with their probabilities.

A class is called what the training data called it, or as the file of --labels says; in weights
without names of classes it has its number.

CKPT is a directory of weights (converted, a job's or a run's), a torch or safetensors file, or
hf://OWNER/REPOSITORY[/FILE]. An IMAGE is a file, or a folder that is searched with all folders in
it; a damaged image in a folder is named on stderr and left out. Images are resized, cropped and
normalised as in evaluation, decoded by --workers threads while the network runs on --batch at once.
Of a single NAC student input b takes its state b modulo R, counted without the images left out, and
the batches are of a multiple of R: results do not depend on --batch, and are those of
m2mkd_jax.load(CKPT)(inputs).

--json and --csv write the likeliest classes of every image, --npz all logits, --features what the
head sees (`features`, (B, D)), each beside the images' names; --attention=DIR writes a picture for
every image: of a ViT or V-MoE what the class token attends to in the last block, the mean of its
heads; of a NAC what its input latents read.

Arrays instead of images: the file of --npz_in holds `images` (B, H, W, 3), float32 and normalised;
for a middle module its `tokens` (B, N, D); for a NAC student optionally its `codes` and `states`.
The file of --npz gets `outputs`, and the same as `logits` if the network gives logits.

A detector takes with --npz_in `image_0`, `image_1`, ... (H, W, 3) uint8 RGB of any sizes, and
gives for image i `boxes_i` in its pixels, `scores_i`, `classes_i` and `masks_i`; the backbone of a
detector gives `last_feat` and `p2` to `p6` for `images`. Of image files, --draw=DIR writes pictures
with boxes and masks, --json=FILE the results in COCO's format (image_id: its number from 0;
category_id: the id in the training data where the weights record it, as those that a job has
trained do; otherwise the number of the class from 0, which stderr says).

examples:
  python -m m2mkd_jax.predict runs/nac cat.jpg dog.png --labels=imagenet.json
  python -m m2mkd_jax.predict runs/nac photos --csv=found.csv --top=3 --precision=bfloat16
  python -m m2mkd_jax.predict weights --npz_in=in.npz --npz=out.npz --module=1
  python -m m2mkd_jax.predict detector street.jpg --draw=pictures --json=found.json

exit codes: 0 done; 2 the input is wrong (one line on stderr)
"""

from __future__ import annotations

from collections.abc import Sequence

from m2mkd_jax.command_line import Parser, run_module
from m2mkd_jax.parallel.huge_pages import start_again


def parser() -> Parser:
    """The command's arguments."""
    found = Parser("predict", __doc__)
    found.add_argument("checkpoint", metavar="CKPT", help="the weights")
    found.add_argument("images", metavar="IMAGE", nargs="*", help="image files and folders of them")
    found.add_argument(
        "--labels", default="", metavar="FILE", help="names of the classes: a line each, or JSON"
    )
    found.add_argument("--npz", default="", metavar="OUT", help="file for the outputs")
    found.add_argument("--npz_in", default="", metavar="IN", help="file of inputs, not images")
    found.add_argument("--draw", default="", metavar="DIR", help="pictures of a detector's results")
    found.add_argument(
        "--json", default="", metavar="FILE", help="the results; a detector's in COCO's format"
    )
    found.add_argument(
        "--module", type=int, metavar="I", help="only this stage of the network, counted from 0"
    )
    found.add_argument(
        "--arch", default="", help="the network of torch weights; see m2mkd_jax.convert"
    )
    found.add_argument("--csv", default="", metavar="FILE", help="the results, a line an image")
    found.add_argument("--features", default="", metavar="FILE", help="npz of what the head sees")
    found.add_argument("--attention", default="", metavar="DIR", help="pictures of attention")
    found.add_argument("--top", type=int, default=5, metavar="K", help="classes (default: 5)")
    found.add_argument("--batch", type=int, default=64, metavar="N", help="default: 64")
    found.add_argument("--workers", type=int, default=0, metavar="N", help="default: the cores")
    found.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the fastest")
    found.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of what the network computes with (default: float32)",
    )
    found.add_argument("--quiet", action="store_true", help="no progress bar, no line an image")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. `argv`: arguments, by default those of the process."""
    if argv is None:
        start_again()
    return run_module("predict", parser(), argv)
