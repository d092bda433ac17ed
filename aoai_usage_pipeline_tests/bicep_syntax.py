"""The syntax of Bicep files, by the grammar of tree-sitter-bicep where that is right."""

import re
from collections.abc import Iterator

import tree_sitter_bicep
from tree_sitter import Language, Parser
from tree_sitter import Node as Parsed

_PARSER = Parser(Language(tree_sitter_bicep.language()))


class Node:
    """A piece of the syntax. The grammar lets operators bind stronger than the dot: `a ? b : c.d` comes as `(a ? b : c).d`. This tree has them right."""

    def __init__(self, parsed: Parsed, source: bytes) -> None:
        self.type, self.is_named, self.is_missing = parsed.type, parsed.is_named, parsed.is_missing
        self.start, self.end, self.source = parsed.start_byte, parsed.end_byte, source
        self.start_point = (parsed.start_point[0], parsed.start_point[1])
        self.children = [Node(child, source) for child in parsed.children]
        self.fields = {name: self.children[i] for i in range(len(self.children)) if (name := parsed.field_name_for_child(i))}
        self.children = [_bound(child) for child in self.children]
        self.parent: Node | None = None

    @property
    def named_children(self) -> list["Node"]:
        return [c for c in self.children if c.is_named]

    @property
    def text(self) -> str:
        return self.source[self.start : self.end].decode()

    def adopt(self) -> "Node":
        """Tell everything what it is in."""
        for child in self.children:
            child.parent = self
            child.adopt()
        return self


SPREAD = "_"
"""The key of what is spread into an object."""

_POSTFIX = ("member_expression", "subscript_expression", "resource_expression", "call_expression")
_OPERATORS = ("??", "||", "&&", "== != =~ !~", "< <= > >=", "+ -", "* / %")


def _strength(node: Node) -> int | None:
    """How strong an operator binds; None for anything else."""
    if node.type == "binary_expression":
        return 2 + next(i for i, of in enumerate(_OPERATORS) if node.fields["operator"].text in of.split())
    return {"lambda_expression": 0, "ternary_expression": 1, "unary_expression": 20, **dict.fromkeys(_POSTFIX, 30)}.get(node.type)


def _bound(node: Node) -> Node:
    """Give what binds stronger to the last operand of what stands before it."""
    mine, first = _strength(node), node.children[0] if node.children else node
    theirs = _strength(first)
    if mine is None or theirs is None or theirs > mine or (theirs == mine and mine != 1):
        return node
    last = first.children[-1]
    node.children[0], node.start, node.start_point = last, last.start, last.start_point
    first.children[-1], first.end = _bound(node), node.end
    return first


def parse(source: bytes) -> Node:
    """The syntax of a file; what is wrong in it is of type ERROR or missing."""
    root = Node(_PARSER.parse(source).root_node, source)
    # the grammar does not know the spread, `...x`; a property with a name of its own in its place keeps every position
    if any(n.type == "ERROR" and text(n).startswith("...") for n in walk(root)):
        source = re.sub(rb"([{,\n]\s*)\.\.\.(?=[\w(])", rb"\1" + f"{SPREAD} :".encode(), source)
        root = Node(_PARSER.parse(source).root_node, source)
    return root.adopt()


def kids(node: Node) -> list[Node]:
    """The children that carry meaning."""
    return [c for c in node.named_children if c.type not in ("comment", "diagnostic_comment")]


def text(node: Node) -> str:
    return node.text


def pieces(node: Node) -> list[str | Node]:
    """The texts of a string and, between them, the expressions in it. The grammar gives spaces to what follows them, so the texts are cut from the source."""
    quote = node.children[0].text
    found: list[str | Node] = []
    start = node.start + len(quote)
    for child in [*(c for c in node.children if c.type == "interpolation"), node.children[-1]]:
        end = child.children[0].end - len("${") if child.type == "interpolation" else child.end - len(quote)
        plain = node.source[start:end].decode()
        found.append(plain.removeprefix("\n") if quote == "'''" else re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), plain))
        if child.type == "interpolation":
            found.append(kids(child)[0])
        start = child.end
    return found


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def literal(node: Node | None) -> str | None:
    """The text of a string without interpolation."""
    if node is None or node.type != "string":
        return None
    (first, *more) = pieces(node)
    return first if isinstance(first, str) and not more else None


def entries(node: Node) -> Iterator[tuple[str | None, Node, Node]]:
    """(key, key node, value) of an object; the key is None where it is known only when deploying."""
    for entry in kids(node):
        if entry.type == "object_property" and len(found := kids(entry)) > 1:
            yield (text(found[0]) if found[0].type == "identifier" else literal(found[0])), found[0], found[1]


def lambda_of(node: Node) -> tuple[list[str], Node]:
    """The parameters and the result of a lambda."""
    first, result = kids(node)[0], kids(node)[-1]
    return [text(n) for n in ([first] if first.type == "identifier" else kids(first))], result


def entry(node: Node, name: str) -> Node | None:
    return next((value for key, _, value in entries(node) if key == name), None)


def body(node: Node) -> Node:
    """The object of a resource or module, without its loop and condition."""
    found = kids(node)[-1]
    while found.type in ("for_statement", "if_statement", "parenthesized_expression"):
        found = kids(found)[-1]
    return found


def above(node: Node) -> Iterator[Node]:
    """What a node is in, from the inside out."""
    while node.parent:
        node = node.parent
        yield node


def walk(node: Node) -> Iterator[Node]:
    """The node and everything in it."""
    yield node
    for child in node.children:
        yield from walk(child)
