"""Dialogues → text, through a model's own chat template.

Chat templates are programs from the model folder, hostile until proven otherwise: they run in a sandbox, in a child
process with limits on time, memory and open files.
"""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from llmpare.calibration_data import Row
from llmpare.compress.errors import InputError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5  # of the processor for a batch of rows; honest templates take milliseconds
PATIENCE = 60.0  # seconds by the clock, start of the process included: a busy machine is no fault of the template
MEMORY = 2**30
OUTPUT = 64 * 2**20  # characters a batch of rows may become


def render(rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """The dialogues of the rows as the tokenizer's chat template writes them. Raises InputError if it cannot."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError("the model has no chat template", "leave out --chat-template") from error
    special = tokenizer.special_tokens_map
    job = {
        "template": template,
        "tokens": {name: token for name, token in special.items() if isinstance(token, str)},
        "seconds": SECONDS,
        "dialogues": [[vars(message) for message in row.messages or ()] for row in rows],
    }
    child = [sys.executable, "-P", "-c", f"from {__name__} import render_job; render_job()"]
    stdin = json.dumps(job).encode()
    try:
        done = subprocess.run(child, input=stdin, capture_output=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise _rejected(rows, error.stdout or b"", f"not done after {PATIENCE:g} s") from error
    if done.returncode == -signal.SIGXCPU:
        raise _rejected(rows, done.stdout, f"not done after {SECONDS} s of the processor's time")
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:500]
        raise _rejected(rows, done.stdout, reason or f"its process ended with code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _rejected(rows: Sequence[Row], stdout: bytes, reason: str) -> InputError:
    """The error for the first row of which the child has not printed the text."""
    place = rows[min(stdout.count(b"\n"), len(rows) - 1)].place
    return InputError(
        f"template rejected: {reason} (at {place})", "without --chat-template dialogues become paragraphs"
    )


def render_job() -> None:
    """The child: a job as JSON on stdin, the text of each dialogue as a line of JSON on stdout."""
    job = json.load(sys.stdin)
    sandbox = _sandbox()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What the start has taken does not count. The soft limit ends the process with a signal of its own.
    limit = math.ceil(time.process_time()) + job["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    template = sandbox.from_string(job["template"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    room = OUTPUT
    for messages in job["dialogues"]:
        text = template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False, **job["tokens"]
        )
        room -= len(text)
        if room < 0:
            raise ValueError(f"more than {OUTPUT >> 20} Mi characters of output")
        print(json.dumps(text), flush=True)


def _sandbox() -> "ImmutableSandboxedEnvironment":
    """An environment that renders what transformers renders, except that the date stands still."""
    import jinja2.debug  # noqa: F401  imported by jinja2 when a template fails, too late to open a file
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what the model says, for training; here it is only passed over."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PlainNamespace(Namespace):
        """A namespace in which no name of Python's own machinery can be set."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise TemplateError(f"{name} is not a name to set")
            super().__setitem__(name, value)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message)[:500])

    def strftime_now(form: str) -> str:
        # Templates put the date into the system prompt; tomorrow the same command must give the same tokens.
        return date(2025, 1, 1).strftime(form)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    sandbox.globals["namespace"] = PlainNamespace
    return sandbox
