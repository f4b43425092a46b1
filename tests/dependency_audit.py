"""Asks pip-audit for known vulnerabilities of pinned packages: `python tests/dependency_audit.py FILE`.

Where it gets its data depends on the machine. What could not be looked up is no vulnerability, but it is said: a scan
that saw nothing must not look like one that found nothing. Ends with 1 if there is a vulnerability.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 600


def pip_audit(requirements: Path) -> tuple[list[dict[str, Any]], str]:
    """Each package with its `vulns`, or with a `skip_reason`; none at all, and why, if nothing could be asked."""
    options = ["--requirement", str(requirements), "--no-deps", "--disable-pip", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return [], (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
    return packages, ""


def report(packages: Sequence[dict[str, Any]], problem: str) -> tuple[int, list[str]]:
    """The exit code, and the lines to print."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [(package, each) for package in packages for each in package.get("vulns", ())]
    lines = [f"{p['name']} {p['version']}: {v['id']}, fixed in {v['fix_versions'] or 'no release'}" for p, v in found]
    num_asked = len(packages) - len(skipped)
    if num_asked == 0:
        why = packages[0]["skip_reason"] if packages else problem
        lines.append(f"NOT AUDITED: no vulnerability data can be reached from here ({why})")
    else:
        lines.append(f"{num_asked} packages audited, {len(found)} known vulnerabilities")
        lines += [f"not audited: {', '.join(skipped)}"] if skipped else []
    return int(bool(found)), lines


def main() -> int:
    code, lines = report(*pip_audit(Path(sys.argv[1])))
    print(*lines, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
