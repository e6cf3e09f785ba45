"""Croissant metadata (JSON-LD) of a set of synthetic images.

Source: MLCommons, "Croissant Format Specification", version 1.1. Licence, creator and date, which it recommends, are
for whoever publishes the set.
"""

import re
from collections.abc import Mapping
from typing import Any

from kr_fast.report.exported import data_card

VERSION = "http://mlcommons.org/croissant/1.1"
ENCODING = {"parquet": "application/x-parquet", "webdataset": "application/x-tar", "npz": "application/zip"}
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def metadata(summary: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata; the arguments are those of :func:`kr_fast.report.exported.data_card.text`."""
    title = data_card.title(summary)
    parts = [data_card.description(summary, facts), data_card.leaks(summary)]
    answers = data_card.answers(summary["config"], facts["column"], summary.get("guarantee"))
    described = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": VERSION,
        "version": "1.0.0",
        "name": re.sub(r"[^A-Za-z0-9_-]+", "-", title).strip("-"),
        "description": " ".join([*parts, answers]),
        "distribution": [_file(each, ENCODING[facts["format"]]) for each in facts["files"]],
    }
    if facts["format"] == "parquet":
        described["recordSet"] = [_records(each, summary, facts) for each in facts["files"]]
    return described


def _file(each: Mapping[str, Any], encoding: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": each["path"],
        "name": each["path"],
        "contentUrl": each["path"],
        "contentSize": f"{each['bytes']} B",
        "encodingFormat": encoding,
        "sha256": each["sha256"],
    }


def _records(each: Mapping[str, Any], summary: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of one file."""
    name = each["path"].split("/")[-1].split(".")[0]
    kinds = {"image": "sc:ImageObject", "label": "sc:Integer", "id": "sc:Integer"}
    kinds |= {"soft_label": "sc:Float", "teacher_label": "sc:Integer"}
    fields = []
    for column, words in data_card.columns(summary, facts).items():
        field = {
            "@type": "cr:Field",
            "@id": f"{name}/{column}",
            "description": words,
            "dataType": kinds[column],
            "source": {"fileObject": {"@id": each["path"]}, "extract": {"column": column}},
        }
        if column == "image":
            field["source"]["transform"] = {"jsonPath": "bytes"}
        if column == "soft_label":
            field |= {"isArray": True, "arrayShape": str(summary["dataset"]["num_classes"])}
        fields.append(field)
    return {"@type": "cr:RecordSet", "@id": name, "field": fields}
