"""The distinct documents of a text, in another order in every pass, however large it is: what is
too large to hold is read again in each pass, and shuffled a buffer at a time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gradmap.common.console import waiting
from gradmap.data.text_specs import source_files
from gradmap.data.texts import DocumentsAt, no_text, stream_texts

# As text, or as the token ids that a model wrote.
Document = str | tuple[int, ...]
AnyDocument = TypeVar("AnyDocument", bound=Document)

# A text with fewer documents and characters is held in memory. Of another, so many are, among which
# the next one is drawn.
BUFFER_DOCUMENTS = 100_000
BUFFER_LENGTH = 1 << 26
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
    """All that are not held out. source: a Text, or the documents themselves where they are few
    enough; left_out: hashes of those that are held out; sha256: tells whether they are still the
    same."""

    name: str
    source: Text | list[Document]
    left_out: frozenset[bytes]
    sha256: str

    def in_pass(self, number: int, generator: random.Random) -> Iterator[Document]:
        """In an order that the generator draws. Raises UserError where the text cannot be read any
        more."""
        if isinstance(self.source, Text):
            return shuffled(self.source.read(number, self.left_out), generator)
        return shuffled(iter(self.source), generator)


@dataclass
class Beginning:
    """What a text begins with, shuffled: as much as is held in memory, and `more` that is not.
    Held-out documents are taken away from it."""

    name: str
    documents: list[Document]
    more: Text | None
    sha256: str
    taken: list[Document] = field(default_factory=list)

    @classmethod
    def read(cls, text: Text) -> Beginning:
        """Raises UserError if the text cannot be read, or there is none."""
        with waiting(f"Reading {text.spec}"):
            source = text.read(0)
            documents: list[Document] = [*take_buffer(source)]
            more = None if next(source, None) is None else text
        if not documents:
            raise no_text(text.spec)
        random.Random(text.seed).shuffle(documents)
        return cls(text.spec, documents, more, _sha256(documents, _sizes(text.spec)))

    @classmethod
    def of(cls, name: str, documents: Iterable[Document]) -> Beginning:
        """All of it, in its order."""
        known = list(documents)
        return cls(name, known, None, _sha256(known, []))

    def hold_out(self) -> Document:
        self.taken.append(self.documents.pop())
        return self.taken[-1]

    def rest(self) -> Documents:
        """What is not held out."""
        left_out = frozenset(map(hash_document, self.taken))
        source = self.documents if self.more is None else self.more
        return Documents(self.name, source, left_out, self.sha256)


def take_buffer(documents: Iterator[AnyDocument]) -> list[AnyDocument]:
    """The first documents, as many as are held in memory."""
    taken: list[AnyDocument] = []
    length = 0
    while len(taken) < BUFFER_DOCUMENTS and length < BUFFER_LENGTH:
        document = next(documents, None)
        if document is None:
            break
        taken.append(document)
        length += len(document)
    return taken


def shuffled(documents: Iterator[AnyDocument], generator: random.Random) -> Iterator[AnyDocument]:
    """The documents in an order that the generator draws: of those in a buffer any may come next,
    and the next one that is read takes its place."""
    buffer = take_buffer(documents)
    for document in documents:
        place = generator.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = document
    yield from generator.sample(buffer, len(buffer))


def hash_document(document: Document) -> bytes:
    contents = document if isinstance(document, str) else str(document)
    return hashlib.blake2b(contents.encode(), digest_size=HASH_BYTES).digest()


def _sha256(beginning: Iterable[Document], sizes: Sequence[int]) -> str:
    """Of a text's beginning, and of the sizes of its files: to read a large one to its end takes
    longer than to train on some of it."""
    digest = hashlib.sha256(str(sizes).encode())
    for document in beginning:
        digest.update(hash_document(document))
    return digest.hexdigest()


def _sizes(spec: str) -> list[int]:
    """Of the files that a SPEC names."""
    files = [
        file
        for path in source_files(spec)
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
    ]
    return [file.stat().st_size for file in files]
