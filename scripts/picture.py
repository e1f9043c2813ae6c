"""Take a picture of a report for the README.

    python -m scripts.picture --run WORK [--out docs/report.png]

The page `WORK/report/index.html` is opened in headless Chromium, in light colours and without a
network, and its top is written as a PNG. It needs Playwright (extra `dev`) and Chromium.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1200, 1500
"""CSS pixels of the page that are shown"""
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, if any."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def take_picture(page: Path, out: Path, *, scale: float = 1.0) -> None:
    """Write the top of a page as a PNG.

    Args:
        page: HTML file.
        out: of the picture, `WIDTH` × `HEIGHT` times `scale` px.
        scale: pixels of the picture for one of the page.

    Raises:
        FileNotFoundError: the page or Chromium is not there.
    """
    from playwright.sync_api import sync_playwright

    if not page.is_file():
        raise FileNotFoundError(f"{page}: there is no report. Run `camenn report --run {page.parent.parent}`.")
    chromium = find_chromium()
    if chromium is None:
        raise FileNotFoundError("Chromium is not installed. Install it, or name it in the variable CHROMIUM.")
    with tempfile.TemporaryDirectory(prefix="camenn-picture-") as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            headless=True,
            args=list(ARGUMENTS),
            offline=True,
            color_scheme="light",
            viewport={"width": WIDTH, "height": HEIGHT},
            device_scale_factor=scale,
        )
        try:
            tab = context.new_page()
            tab.goto(page.resolve().as_uri(), wait_until="load")
            tab.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => null)))")
            tab.screenshot(path=str(out))
        finally:
            context.close()


def main(argv: list[str] | None = None) -> int:
    """Take the picture and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m scripts.picture", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="working directory with a report in it")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "report.png", help="PNG to write (default docs/report.png)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="pixels for one of the page (default %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        take_picture(arguments.run / "report" / "index.html", arguments.out, scale=arguments.scale)
    except FileNotFoundError as error:
        print(f"picture: {error}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
