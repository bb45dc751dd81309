"""Completion for bash, zsh and fish, generated once from the commands' own help:

    ringlip completion bash > ~/.local/share/bash-completion/completions/ringlip
    ringlip completion zsh > ~/.zfunc/_ringlip            # a folder of $fpath
    ringlip completion fish > ~/.config/fish/completions/ringlip.fish

The script contains all words: pressing TAB does not start Python (argcomplete would import torch each time) and needs
no package. It completes commands, their options, ``section.key=`` of a recipe, the recipes that RingLIP ships, and
files.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import warnings
from collections.abc import Callable

from data_tools.io.command_table import Groups
from data_tools.io.errors import UserError
from trainer.core.shipped import shipped

OPTION = re.compile(r"^  (?:-\w, )?(--[a-z][a-z-]+)", re.MULTILINE)
KEY = re.compile(r"^(?:  )?([a-z]\w*(?:\.\w+)+)(?: = |:)", re.MULTILINE)
"""A key of a recipe in the help of `train`."""
WITH_RECIPE = ("train", "plan", "launch")


Start = Callable[[str, list[str]], None]
"""Runs a command: name, arguments."""


def script(arguments: list[str], groups: Groups, start: Start) -> str:
    """The completion script for the shell in ``arguments``. Raises UserError for an unknown shell."""
    shells = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if len(arguments) != 1 or arguments[0] not in shells:
        raise UserError(
            f"ringlip completion: name one shell of {', '.join(shells)}; `ringlip completion bash` prints its script"
        )
    about = {name: text for commands in groups.values() for name, text in commands.items()}
    helps = {name: _help(name, start) for name in about if name != "completion"}
    recipe = sorted(path.stem for path in shipped("recipes").glob("*.yaml"))
    recipe += [f"{key}=" for key in dict.fromkeys(KEY.findall(helps["train"]))]
    words = {
        name: sorted(set(OPTION.findall(text))) + (recipe if name in WITH_RECIPE else [])
        for name, text in helps.items()
    }
    return shells[arguments[0]](about, words | {"completion": list(shells)})


def _help(name: str, start: Start) -> str:
    if name == "launch":
        command = ["bash", str(shipped("launch") / "multinode.sh"), "--help"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: a module has been imported by another command's
        start(name, ["--help"])
    return out.getvalue()


def _bash(about: dict[str, str], words: dict[str, list[str]]) -> str:
    cases = "\n".join(f'    {name}) words="{" ".join(found)}" ;;' for name, found in words.items())
    return f"""# bash completion for ringlip: `ringlip completion bash` prints it
_ringlip() {{
  local words="" current="${{COMP_WORDS[COMP_CWORD]}}"
  # readline splits at "=": what follows it is a value, which may be a file.
  if [[ $current == "=" ]]; then current=""; fi
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{" ".join(about)} --help --version" -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  [[ ${{COMP_WORDS[COMP_CWORD-1]}} != "=" && ${{COMP_WORDS[COMP_CWORD]}} != "=" ]] || words=""
  COMPREPLY=($(compgen -W "$words" -- "$current") $(compgen -f -- "$current"))
  if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace; fi
}}
complete -o filenames -F _ringlip ringlip"""


def _zsh(about: dict[str, str], words: dict[str, list[str]]) -> str:
    described = "\n".join(f"    {_quoted(f'{name}:{text}')}" for name, text in about.items())
    cases = "\n".join(f"    {name}) found=({' '.join(found)}) ;;" for name, found in words.items())
    return f"""#compdef ringlip
# zsh completion for ringlip: `ringlip completion zsh` prints it
_ringlip() {{
  local -a commands found keys
  commands=(
{described}
  )
  if ((CURRENT == 2)); then
    _describe command commands
    compadd -- --help --version
    return
  fi
  local command=$words[2]
  case $command in
{cases}
  esac
  keys=(${{(M)found:#*=}})
  compadd -- ${{found:#*=}}
  compadd -S '' -- $keys
  _files
}}
_ringlip "$@\""""


def _fish(about: dict[str, str], words: dict[str, list[str]]) -> str:
    lines = ["# fish completion for ringlip: `ringlip completion fish` prints it"]
    lines += [
        f"complete -c ringlip -f -n __fish_use_subcommand -a {name} -d {_quoted(text)}" for name, text in about.items()
    ]
    lines += [
        f"complete -c ringlip -n '__fish_seen_subcommand_from {name}' -a {_quoted(' '.join(found))}"
        for name, found in words.items()
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """For zsh and fish, of texts without backslashes."""
    return "'" + text.replace("'", "'\"'\"'") + "'"
