"""The page in a real browser: no network requests, no error, every photo drawn, nothing wider than a phone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from PIL import Image

from pipelines.report.command import main
from scripts.picture import ARGUMENTS
from tests.support.work_directory import make_work

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed: the report is not opened in a browser"
)

CHROMIUM = "/usr/bin/chromium"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not os.path.exists(CHROMIUM), reason=f"{CHROMIUM} is absent: the report is not opened in a browser"
    ),
]


class Visit:
    """The open page, with the browser's messages and requests."""

    def __init__(self, page: "Page") -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on(
            "console",
            lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, path: Path) -> None:
        self.page.goto(path.as_uri(), wait_until="load")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = make_work(tmp_path_factory.mktemp("report"))
    assert main(["--run", str(work)]) == 0
    return work / "report" / "index.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[BrowserContext]":
    with playwright_api.sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=list(ARGUMENTS)
        )
        yield context
        context.close()


@pytest.fixture
def visit(browser: "BrowserContext") -> "Iterator[Visit]":
    page = browser.new_page()
    yield Visit(page)
    page.close()


@pytest.mark.parametrize(
    ("name", "width", "height", "scheme"),
    [("desktop", 1200, 900, "light"), ("phone", 390, 844, "light"), ("dark", 1200, 900, "dark")],
)
def test_report_opens_without_errors_requests_or_overflow(
    visit: Visit, report: Path, tmp_path: Path, name: str, width: int, height: int, scheme: Literal["dark", "light"]
) -> None:
    visit.page.set_viewport_size({"width": width, "height": height})
    visit.page.emulate_media(color_scheme=scheme)
    visit.open(report)
    assert visit.errors == []
    assert [url for url in visit.requests if not url.startswith("data:")] == [report.as_uri()]
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    visit.page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_report_draws_every_photo(visit: Visit, report: Path) -> None:
    visit.open(report)
    widths = visit.page.evaluate(
        "Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth)))"
    )
    assert len(widths) > 20
    assert min(widths) > 0


def test_report_shows_hostile_title_as_text(visit: Visit, report: Path) -> None:
    visit.open(report)
    assert visit.page.title().startswith("CameNN report")
    assert visit.page.get_by_text("<script>document.title = 'owned'</script>").count() > 0
    assert visit.page.evaluate("document.scripts.length") == 1


def test_store_selector_shows_one_store(visit: Visit, report: Path) -> None:
    visit.open(report)
    assert visit.page.locator(".store:visible").count() == 1
    visit.page.locator("#store").select_option("s003")
    assert visit.page.locator(".store:visible h3").inner_text() == "Store s003"
    assert visit.errors == []


@pytest.mark.parametrize("width", [1200, 390])
def test_a_listing_opens_to_its_details(visit: Visit, report: Path, width: int) -> None:
    visit.page.set_viewport_size({"width": width, "height": 900})
    visit.open(report)
    more = visit.page.locator(".store:visible details.more").first
    assert not more.locator("dl").is_visible()
    more.locator("summary").click()
    assert more.get_by_text("mean rate by hour").is_visible()
    assert all(bar["height"] > 5 for bar in (box.bounding_box() for box in more.locator(".hours i").all()) if bar)
    assert more.locator(".hours i").count() == 2
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.errors == []


def test_page_policy_blocks_injected_script(visit: Visit, report: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(report.read_text().replace("</main>", "<script>document.title = 'owned'</script></main>"))
    visit.open(bad)
    assert visit.page.title() != "owned"
    assert visit.errors


def test_picture_of_a_report_is_taken(report: Path, tmp_path: Path) -> None:
    """In a process of its own: Playwright runs once in each."""

    def take(run: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "scripts.picture", "--run", str(run), "--out", str(tmp_path / "report.png")]
        return subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)

    missing = take(tmp_path)
    assert missing.returncode == 2 and "camenn report --run" in missing.stderr
    assert take(report.parents[1]).returncode == 0
    with Image.open(tmp_path / "report.png") as picture:
        colours = picture.convert("L").getcolors()
        assert picture.size == (1200, 1500) and colours is not None and len(colours) > 50
