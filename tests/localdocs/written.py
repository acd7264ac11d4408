"""Files of kinds that libraries read, written by hand or by those libraries."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence


def pdf(pages: Sequence[str], title: str = "", kids: str = "") -> bytes:
    """A PDF with a line of text on each page; ``kids`` replaces the list of its pages."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    numbers = []
    for text in pages:
        numbers.append(len(objects) + 1)
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {len(objects) + 2} 0 R"
            " /Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
            f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream",
        ]
    own = " ".join(f"{n} 0 R" for n in numbers)
    objects[1] = f"<< /Type /Pages /Count {len(numbers)} /Kids [{kids or own}] >>"
    objects.append(f"<< /Title ({title}) /Author (Ada) /CreationDate (D:20240229120000Z) >>")
    return assembled(objects)


def assembled(objects: Sequence[str]) -> bytes:
    """Numbered objects as a PDF; the last one is its description."""
    out = bytearray(b"%PDF-1.4\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    for place in places:
        out += f"{place:010} 00000 n \n".encode()
    size = len(objects) + 1
    out += f"trailer << /Size {size} /Root 1 0 R /Info {len(objects)} 0 R >>\n".encode()
    return bytes(out + f"startxref\n{start}\n%%EOF\n".encode())


def docx() -> bytes:
    """A Word document with headings, a paragraph of two lines and a table."""
    import docx as word

    document = word.Document()
    document.add_heading("Contract", 0)
    document.add_paragraph("Between two parties.")
    document.add_heading("Price", 1)
    document.add_paragraph("The price is twelve euros.")
    table = document.add_table(rows=1, cols=2)
    table.rows[0].cells[0].text, table.rows[0].cells[1].text = "apples", "three"
    document.core_properties.author = "Grace"
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def bomb(n: int = 1 << 30) -> bytes:
    """A .docx whose document unpacks to n zeros."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(docx())) as good,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z,
    ):
        for name in good.namelist():
            if name != "word/document.xml":
                z.writestr(name, good.read(name))
        with z.open("word/document.xml", "w", force_zip64=True) as part:
            for _ in range(n >> 20):
                part.write(bytes(1 << 20))
    return out.getvalue()


def lying(data: bytes) -> bytes:
    """A zip whose directory says that each file has 10 bytes."""
    at, found = 0, bytearray(data)
    while (at := data.find(b"PK\x01\x02", at)) >= 0:
        found[at + 24 : at + 28] = (10).to_bytes(4, "little")
        at += 4
    return bytes(found)


def laughing() -> bytes:
    """A .docx whose XML defines entities that multiply: a billion laughs."""
    entities = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    xml = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "lol">{entities}]><x>&l9;</x>'
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(docx())) as good,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z,
    ):
        for name in good.namelist():
            z.writestr(name, xml if name == "word/document.xml" else good.read(name))
    return out.getvalue()
