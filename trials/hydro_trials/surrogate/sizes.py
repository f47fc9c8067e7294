"""Sizes of dimensions as sums of products of unknowns, learned while a model runs.

A *size* is a sum of terms, each a whole number times some *atoms*: a flattened feature map is 16 C, concatenated
branches are C + D, a model dimension that attention views as heads is h d. Two dimensions that meet in an operation are
unified; an atom that meets a number is pinned to it. What stays free at the end follows width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Term = tuple[int, tuple[int, ...]]
Size = tuple[Term, ...]
"""Terms (factor, atoms), sorted; a plain number has no atoms."""


@dataclass
class Split:
    """A size that was viewed as two factors, of which one shrinks and the other keeps its size."""

    first: int
    second: int
    module: str
    shrink_first: bool
    flippable: bool = False
    """Whether the other one may shrink as well (groups of a convolution; not heads)."""


@dataclass
class SizeTable:
    """All atoms of one model: their sizes, and what they have turned out to be."""

    values: list[int] = field(default_factory=list)
    bound: dict[int, Size] = field(default_factory=dict)
    splits: list[Split] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    """Atoms of tensors that the model makes by itself (masks, repeated heads): they never shrink of their own."""
    _halves: dict[tuple[int, int], tuple[Size, Size]] = field(default_factory=dict)

    def fresh(self, value: int, *, kept: bool = False) -> Size:
        """A new unknown of this size; 0 and 1 are numbers."""
        if value < 2:
            return number(value)
        self.values.append(value)
        if kept:
            self.kept.add(len(self.values) - 1)
        return ((1, (len(self.values) - 1,)),)

    def resolve(self, size: Size) -> Size:
        """A size in free atoms."""
        if not any(atom in self.bound for _, atoms in size for atom in atoms):
            return size
        total: Size = ()
        for factor, atoms in size:
            product: Size = number(factor)
            for atom in atoms:
                inner = self.resolve(self.bound[atom]) if atom in self.bound else ((1, (atom,)),)
                product = times(product, inner)
            total = plus(total, product)
        return total

    def value(self, size: Size, narrow: Mapping[int, int] | None = None) -> int:
        """The number that a size stands for; `narrow` gives the sizes of atoms that shrink."""
        narrow = narrow or {}
        total = 0
        for factor, atoms in self.resolve(size):
            for atom in atoms:
                factor *= narrow.get(atom, self.values[atom])
            total += factor
        return total

    def free(self, size: Size) -> set[int]:
        """The free atoms in a size."""
        return {atom for _, atoms in self.resolve(size) for atom in atoms}

    def pin(self, size: Size) -> None:
        """Fix every atom in a size at its value."""
        for atom in self.free(size):
            self.bound[atom] = number(self.values[atom])

    def unify(self, left: Size, right: Size) -> None:
        """Learn that two sizes are one; what cannot be understood is pinned."""
        left, right = self.resolve(left), self.resolve(right)
        if left == right:
            return
        for one, other in ((left, right), (right, left)):
            atom = _single_atom(one)
            if atom is not None and atom not in self.free(other):
                if atom in self.kept and _single_atom(other) is not None:
                    self.kept.discard(atom)
                self.bound[atom] = other
                return
        if len(left) == len(right) and all(
            self.value((a,)) == self.value((b,)) and len(a[1]) == len(b[1]) > 0
            for a, b in zip(left, right, strict=True)
        ):
            for (left_factor, left_atoms), (right_factor, right_atoms) in zip(left, right, strict=True):
                values = [[self.values[atom] for atom in atoms] for atoms in (left_atoms, right_atoms)]
                if left_factor != right_factor or values[0] != values[1]:
                    break
                for a, b in zip(left_atoms, right_atoms, strict=True):
                    self.unify(((1, (a,)),), ((1, (b,)),))
            else:
                return
        if len(left) == len(right) == 1:
            for narrow, wide in ((left[0], right[0]), (right[0], left[0])):
                if len(narrow[1]) == 1 and wide[0] % narrow[0] == 0 and narrow[1][0] not in wide[1]:
                    self.bound[narrow[1][0]] = ((wide[0] // narrow[0], wide[1]),)
                    return
        self.pin(left)
        self.pin(right)

    def split(
        self, size: Size, first: int, module: str, *, shrink_first: bool, flippable: bool = False
    ) -> tuple[Size, Size] | None:
        """View a size as `first` times the rest; None (and pinned) where that cannot be told."""
        size = self.resolve(size)
        value = self.value(size)
        if len(size) == 1:
            factor, atoms = size[0]
            if not atoms:
                return number(first), number(value // first)
            ordered = [number(factor)] * (factor > 1) + [((1, (atom,)),) for atom in atoms]
            for arrangement in (ordered, [*ordered[1:], ordered[0]] if factor > 1 else ordered):
                for length in range(1, len(arrangement)):
                    head = product(arrangement[:length])
                    if self.value(head) == first:
                        return head, product(arrangement[length:])
            if len(atoms) == 1 and factor == 1:
                key = (atoms[0], first)
                if key not in self._halves:
                    one, other = self.fresh(first), self.fresh(value // first)
                    self._halves[key] = one, other
                    self.bound[atoms[0]] = times(one, other)
                    if _single_atom(one) is not None and _single_atom(other) is not None:
                        self.splits.append(Split(one[0][1][0], other[0][1][0], module, shrink_first, flippable))
                return self._halves[key]
            if factor > 1 and factor % first == 0:
                return number(first), ((factor // first, atoms),)
            if factor > 1 and len(atoms) == 1 and self.values[atoms[0]] % first == 0:
                halves = self.split(((1, atoms),), first, module, shrink_first=shrink_first, flippable=flippable)
                return halves and (halves[0], times(number(factor), halves[1]))
        self.pin(size)
        return None


def number(value: int) -> Size:
    """A known size."""
    return ((value, ()),)


def plus(left: Size, right: Size) -> Size:
    terms: dict[tuple[int, ...], int] = {}
    for factor, atoms in itertools.chain(left, right):
        terms[atoms] = terms.get(atoms, 0) + factor
    return tuple((factor, atoms) for atoms, factor in terms.items() if factor)


def times(left: Size, right: Size) -> Size:
    total: Size = ()
    for (a, atoms_a), (b, atoms_b) in itertools.product(left, right):
        total = plus(total, ((a * b, atoms_a + atoms_b),))
    return total


def product(sizes: Iterable[Size]) -> Size:
    total = number(1)
    for size in sizes:
        total = times(total, size)
    return total


def _single_atom(size: Size) -> int | None:
    if len(size) == 1 and size[0][0] == 1 and len(size[0][1]) == 1:
        return size[0][1][0]
    return None
