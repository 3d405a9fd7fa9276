"""A key set without pictures, and answers of models to it, by their distances."""


def store_answers(db, models, n_keys, n_answers):
    """A key set `k` of source `ours`, and answers: model -> distances (n_keys, n_answers), label and stratum."""
    about = {"source": "ours", "strategy": "generation", "descriptor": "l2", "n_answers": n_answers}
    db.writer.upsert("key_sets", [{"key_set_id": "k", **about}])
    keys = [
        {"key_id": f"k/{n}", "number": n, "prompt": f"p{n}", "image_id": f"keys/k/{n}"} for n in range(1, n_keys + 1)
    ]
    db.writer.upsert("keys", [key | {"key_set_id": "k"} for key in keys])
    answers, labels = [], []
    for name, (distances, label, stratum) in models.items():
        answers += [
            {
                "image_id": f"answers/k/{name}/{n}/{place}",
                "key_id": f"k/{n}",
                "suspect_id": name,
                "distance": float(one),
            }
            for n, of_key in enumerate(distances, 1)
            for place, one in enumerate(of_key)
        ]
        if label:
            known = {"source": "ours", "suspect_id": name, "label": label, "stratum": stratum}
            labels.append({"label_id": f"ours/{name}", **known})
    db.writer.upsert("answers", answers)
    db.writer.upsert("suspect_labels", labels)
    return db
