"""Damage to JSON and text by a seed: what somebody with an editor, or a bad disk, makes of an artifact."""

import copy
import json
import random

NESTED = json.loads("[" * 150 + "]" * 150)
VALUES = (
    *(None, True, -1, 0, 1, 10**12, 10**30, -(10**18), 0.5, 1e308, float("nan"), float("inf"), -0.1),
    *("", "x", "../../x", "\x00", [], {}, [[]], {"kind": "narrow", "size": 10**12, "of": 10**12, "kept": "f"}, NESTED),
)


def places(node, path=()):
    """All places in a tree, the root too."""
    yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutated(data, chance):
    """A tree with one thing changed: replaced, dropped, doubled, reversed, moved by one."""
    data = copy.deepcopy(data)
    # few places of long lists, so that all entries of the top have their turn
    found = [path for path in places(data) if path]
    path = chance.choice([chance.choice(found), chance.choice([p for p in found if len(p) <= 2])])
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    how = chance.choice(("replace", "replace", "drop", "double", "reverse", "shift"))
    if how == "drop":
        del parent[key]
    elif how == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(old))
    elif how == "double":
        parent[f"{key}x"] = old
    elif how == "reverse" and isinstance(old, list):
        parent[key] = old[::-1]
    elif how == "shift" and isinstance(old, (int, float)):
        parent[key] = old + chance.choice((-1, 1, 1000))
    else:
        parent[key] = copy.deepcopy(chance.choice(VALUES))
    return data


def damaged_text(text, chance):
    """A text with its bytes, and not its meaning, damaged."""
    cut = chance.randrange(len(text))
    return chance.choice(
        (
            text[:cut],
            text[:cut] + "[" * 100_000,
            text[:cut] + "1" * 5000 + text[cut:],
            text[:cut] + chr(chance.randrange(256)) + text[cut + 1 :],
            "[" * 100_000,
            "&a " + text,
            "\x00" * 100,
        )
    )


def damaged(text, chance):
    """A JSON text, damaged in one of these ways."""
    if chance.random() < 0.2:
        return damaged_text(text, chance)
    return json.dumps(mutated(json.loads(text), chance))


def rounds(name, count):
    """Random numbers for each round; equal ones in every run."""
    return [random.Random(f"{name} {number}") for number in range(count)]


def damaged_tensors(content, chance):
    """A safetensors file, damaged: its header, what ppcl says in it, its numbers (all of them NaN), its end."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = chance.choice(("header", "told", "nan", "cut", "drop")) if header else "cut"
    told = header.get("__metadata__", {}).get("ppcl")
    if how == "told" and told:
        header["__metadata__"]["ppcl"] = damaged(told, chance)
    elif how == "nan":
        data = b"\xff" * len(data)
    elif how == "cut":
        data = data[: chance.randrange(len(data) + 1)]
    elif how == "drop":
        del header[chance.choice(sorted(header))]
    else:
        header = mutated(header, chance)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
