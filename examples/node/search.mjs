// What resembles a stored sample: asked of an attrdb directory with LanceDB's own client, without attrdb.
//
//     node search.mjs my.attrdb [SAMPLE_ID] [K] [ENCODER_ID]
//
// Prints one JSON object. Without a sample's id the first one by image_id is taken, without an encoder the first in `encoders`.

import { existsSync } from "node:fs";
import { join } from "node:path";

import { connect } from "@lancedb/lancedb";

const [path, wantedSample, k = "5", wantedEncoder] = process.argv.slice(2);
if (path === undefined || !(Number.parseInt(k) >= 1)) {
  console.error("usage: node search.mjs my.attrdb [SAMPLE_ID] [K >= 1] [ENCODER_ID]");
  process.exit(2);
}
if (!existsSync(join(path, "images.lance"))) {
  console.error(`${path} is not an attrdb database (no images.lance in it)`); // connect() would make a directory there
  process.exit(1);
}

const text = (value) => `'${value.replaceAll("'", "''")}'`;
const db = await connect(path);
const images = await db.openTable("images");
const version = await images.version();
await images.checkout(version); // all answers below are about this version, whatever others append meanwhile

// A customized model counts once its row in `models` is there; attrdb hides images of the others, and so must we.
const models = await (await db.openTable("models")).query().select(["model_id"]).toArray();
const finished = new Set(models.map((row) => row.model_id));
const made = await images.query().where("role <> 'pretraining'").select(["model_id"]).toArray();
const unfinished = [...new Set(made.map((row) => row.model_id))].filter((id) => id !== null && !finished.has(id));
const visible = unfinished.length ? `(model_id IS NULL OR model_id NOT IN (${unfinished.map(text)}))` : "true";

const counts = {};
for (const role of ["exemplar", "pretraining", "sample"]) {
  counts[role] = await images.countRows(`role = '${role}' AND ${visible}`);
}

const byId = (a, b) => (a.image_id < b.image_id ? -1 : 1);
const exemplars = await images
  .query()
  .where(`role = 'exemplar' AND ${visible}`)
  .select(["image_id", "model_id"])
  .toArray();

const encoders = await (await db.openTable("encoders")).query().select(["encoder_id"]).toArray();
const encoder = wantedEncoder ?? encoders[0]?.encoder_id;
if (!encoders.some((row) => row.encoder_id === encoder)) {
  console.error(`no encoder '${encoder}' in ${path}; it has: ${encoders.map((row) => row.encoder_id).join(", ")}`);
  process.exit(1);
}

const which = wantedSample === undefined ? "role = 'sample'" : `image_id = ${text(wantedSample)}`;
const samples = await images.query().where(`${which} AND ${visible}`).select(["image_id", encoder]).toArray();
const [sample] = samples.sort(byId);
if (!sample?.[encoder]) {
  console.error(`no image ${wantedSample ?? "with role 'sample'"} with a feature of '${encoder}' in ${path}`);
  process.exit(1);
}

// The filter is a prefilter: k candidates come back, not those of the k nearest images that happen to be candidates.
// bypassVectorIndex: every candidate is compared, as attrdb's `attribute` does.
const hits = await images
  .query()
  .nearestTo(Float32Array.from(sample[encoder]))
  .column(encoder)
  .distanceType("cosine")
  .bypassVectorIndex()
  .where(`role IN ('exemplar', 'pretraining') AND image_id <> ${text(sample.image_id)} AND ${visible}`)
  .select(["image_id", "role", "model_id", "creator", "license", "_distance"])
  .limit(Number.parseInt(k))
  .toArray();

const answer = {
  version,
  counts,
  exemplars: exemplars.sort(byId).map((row) => ({ image_id: row.image_id, model_id: row.model_id })),
  encoder_id: encoder,
  sample_id: sample.image_id,
  nearest: hits.map((row, i) => ({
    rank: i + 1,
    image_id: row.image_id,
    role: row.role,
    model_id: row.model_id,
    creator: row.creator,
    license: row.license,
    similarity: 1 - row._distance, // features have unit length
  })),
};
console.log(JSON.stringify(answer, null, 2));
