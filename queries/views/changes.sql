-- What has changed since an older moment, up to the version that is read: images and models that were added, removed or changed. Features
-- are not compared. columns lists what differs; a picture that was replaced has another sha256.
-- grain     one row per image or model that differs
-- argument  since               a version of images, or a time (ISO 8601, UTC)
SELECT unnest(_changes(since::VARCHAR), max_depth := 2)
