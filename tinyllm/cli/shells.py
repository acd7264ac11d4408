"""Completion scripts for shells, made of the commands' parsers."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping

BASH = """_tinyllm() {{
    local words="{commands}"
    if [ "$COMP_CWORD" -gt 1 ]; then
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{choices}
            *) case "${{COMP_WORDS[1]}}" in
{options}
                *) words="" ;;
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _tinyllm tinyllm
"""
ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def script(
    shell: str, parsers: Mapping[str, argparse.ArgumentParser], summaries: Mapping[str, str]
) -> str:
    """What completes ``tinyllm``'s commands, options and choices in "bash", "zsh" or "fish"."""
    if shell == "fish":
        return fish(parsers, summaries)
    return (ZSH if shell == "zsh" else "") + bash(parsers)


def bash(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    options, choices = [], []
    for name, parser in parsers.items():
        flags = [flag for action in parser._actions for flag in action.option_strings]
        places = [c for a in parser._actions if not a.option_strings for c in a.choices or ()]
        options.append(f'                {name}) words="{" ".join(flags + places)}" ;;')
        for action in parser._actions:
            for flag in action.option_strings if action.choices else ():
                words = " ".join(map(str, action.choices or ()))
                choices.append(f'            "{name} {flag}") words="{words}" ;;')
    return BASH.format(
        commands=" ".join(parsers), options="\n".join(options), choices="\n".join(choices)
    )


def fish(parsers: Mapping[str, argparse.ArgumentParser], summaries: Mapping[str, str]) -> str:
    lines = []
    for name, parser in parsers.items():
        about = shlex.quote(summaries[name])
        lines.append(f"complete -c tinyllm -n __fish_use_subcommand -a {name} -d {about}")
        for action in parser._actions:
            words = [f"complete -c tinyllm -n '__fish_seen_subcommand_from {name}'"]
            for flag in action.option_strings:
                words.append(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}")
            if action.choices:
                found = " ".join(map(str, action.choices))
                words.append(f"{'-x ' if action.option_strings else ''}-a {shlex.quote(found)}")
            elif not action.option_strings:
                continue
            if action.help:
                words.append(f"-d {shlex.quote(action.help % vars(action))}")
            lines.append(" ".join(words))
    return "\n".join(lines) + "\n"
