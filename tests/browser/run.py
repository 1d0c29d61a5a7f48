"""A report about hostile names, in Chromium: `make test-browser`.

    python -m tests.browser.run --packages DIRECTORY_WITH_node_modules

Three pages: the report; the report without its policy against scripts, so that escaping alone must hold; and the same
payloads as plain markup, which shows that this browser runs them, and that they would be seen.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.hostile_report import PAYLOADS, make_hostile_report

_POLICY = '<meta http-equiv="Content-Security-Policy"'
_HERE = Path(__file__).parent


def main() -> None:
    """Prints what was seen; exits with 1 if a script ran that should not have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    packages = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        report = make_hostile_report(directory)
        pages = [directory / name for name in ("report.html", "without-policy.html", "control.html")]
        html = report.read_text()
        lines = html.splitlines(keepends=True)
        pages[0].write_text(html)
        pages[1].write_text("".join(line for line in lines if not line.startswith(_POLICY)))
        pages[2].write_text("<!doctype html><title>control</title>" + "\n".join(f"<p>{each}</p>" for each in PAYLOADS))
        assert len(html) > len(pages[1].read_text())
        script = packages / "look.mjs"  # beside its node_modules
        script.write_bytes((_HERE / "look.mjs").read_bytes())
        found = subprocess.run(
            ["node", script, *pages], check=True, capture_output=True, text=True, timeout=300
        ).stdout.splitlines()[-1]
    shown, bare, control = json.loads(found)
    for each in (shown, bare, control):
        print(f"{Path(each['path']).name}: {each['elements']} elements, {each['scripts']} scripts, ran {each['ran']}")
    harmless = all(
        not each["ran"]
        and not each["scripts"]
        and not each["requests"]
        and not each["dialogs"]
        and each["elements"] > 100
        for each in (shown, bare)
    )
    sys.exit(0 if harmless and len(set(control["ran"])) >= 3 else 1)


if __name__ == "__main__":
    main()
