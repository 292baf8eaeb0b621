"""The distinct documents of a text, in another order in every pass, however large it is: what is
too large to hold is read again in each pass, and shuffled a buffer at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from gradmap.common.console import waiting
from gradmap.data.text_specs import source_files
from gradmap.data.texts import DocumentsAt, no_text, stream_texts

# A text with fewer than both is held in memory. Of another, so many documents are, among which the
# next one is drawn.
BUFFER_DOCUMENTS = 100_000
BUFFER_CHARACTERS = 1 << 26
# A document that comes again is known by 8 bytes of its hash, up to so many documents: 100 MB.
KNOWN_DOCUMENTS = 1_000_000
HASH_BYTES = 8


@dataclass(frozen=True)
class Text:
    """Where documents come from. spec: of a text; documents_at: what makes documents of its
    rows."""

    spec: str
    seed: int
    documents_at: DocumentsAt

    def read(self, number: int, left_out: Collection[bytes] = ()) -> Iterator[str]:
        """Its documents for a pass, but for those with these hashes, and for those that come
        again."""
        known = set(left_out)
        for document in stream_texts(self.spec, self.seed + number, self.documents_at):
            found = hash_document(document)
            if found in known:
                continue
            if len(known) < KNOWN_DOCUMENTS:
                known.add(found)
            yield document


@dataclass(frozen=True)
class Documents:
    """All that are not held out. in_memory: None where there are too many; left_out: hashes of
    those that are held out; sha256: tells whether the text is still the same."""

    text: Text
    in_memory: list[str] | None
    left_out: frozenset[bytes]
    sha256: str

    def in_pass(self, number: int) -> Iterator[str]:
        """Not shuffled. Raises UserError where the text cannot be read any more."""
        if self.in_memory is not None:
            return iter(self.in_memory)
        return self.text.read(number, self.left_out)


@dataclass
class Beginning:
    """What a text begins with, shuffled: all of it, or as much as is held in memory. Held-out
    documents are taken away from it."""

    text: Text
    documents: list[str]
    is_all: bool
    sha256: str
    taken: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, text: Text) -> Beginning:
        """Raises UserError if the text cannot be read, or there is none."""
        with waiting(f"Reading {text.spec}"):
            source = text.read(0)
            documents = take_buffer(source)
            is_all = next(source, None) is None
        if not documents:
            raise no_text(text.spec)
        random.Random(text.seed).shuffle(documents)
        return cls(text, documents, is_all, _sha256(text.spec, documents))

    def hold_out(self) -> str:
        self.taken.append(self.documents.pop())
        return self.taken[-1]

    def rest(self) -> Documents:
        """What is not held out."""
        left_out = frozenset(map(hash_document, self.taken))
        in_memory = self.documents if self.is_all else None
        return Documents(self.text, in_memory, left_out, self.sha256)


def take_buffer(documents: Iterator[str]) -> list[str]:
    """The first documents, as many as are held in memory."""
    taken: list[str] = []
    characters = 0
    while len(taken) < BUFFER_DOCUMENTS and characters < BUFFER_CHARACTERS:
        document = next(documents, None)
        if document is None:
            break
        taken.append(document)
        characters += len(document)
    return taken


def shuffled(documents: Iterator[str], generator: random.Random) -> Iterator[str]:
    """The documents in an order that the generator draws: of those in a buffer any may come next,
    and the next one that is read takes its place."""
    buffer = take_buffer(documents)
    for document in documents:
        place = generator.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = document
    yield from generator.sample(buffer, len(buffer))


def hash_document(document: str) -> bytes:
    return hashlib.blake2b(document.encode(), digest_size=HASH_BYTES).digest()


def _sha256(spec: str, beginning: list[str]) -> str:
    """Of a text's beginning, and of the sizes of its files: to read a large one to its end takes
    longer than to train on some of it."""
    digest = hashlib.sha256()
    for document in beginning:
        digest.update(hash_document(document))
    for path in source_files(spec):
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        digest.update(str([file.stat().st_size for file in files]).encode())
    return digest.hexdigest()
