"""What people have: image-text pairs in tars, tables and folders, read into one kind of sample.

An input is a PATH or GLOB, local or gs://. It is recognised by looking into it; a folder means every input in it and in
its subfolders (hidden ones, links to folders and files that are none of these kinds are passed over). A link in it that
leads out of it is refused without --follow-links: who packs a folder could have it read any file of this machine.

  webdataset  a .tar or .tar.gz with members NAME.jpg (.jpeg, .png, .webp, .gif, .bmp), NAME.txt, NAME.json in any
              order; other pictures (.tif, .avif, .heic, .jxl) are taken for pictures, and dropped as undecodable_image.
              NAME is the key. A .parquet, .json or _stats.json of the tar's name beside it belongs to the tar.
  parquet     a table with the picture's bytes in a column (jpg, jpeg, png, webp, image, img or image_bytes), or in one
              that holds {bytes, path}, as Hugging Face writes it. Rows whose `status` is "failed..." have no picture.
  jsonl, csv  a table beside its pictures: `file_name` (or image, path, filename, filepath) names the picture, relative
              to the table's folder and inside of it; a link that leads out of it is a sample without a picture
              (link_out_of_folder), or followed with --follow-links. A .csv has a header, and commas, semicolons or
              tabs.

FIELD, what --caption, --label and --keep take a text from:

  webdataset  txt (the .txt member) or json:NAME (a key of the .json member)
  parquet     a column of texts, lists of texts, numbers or truth values
  jsonl       a key
  csv         a column

One shard may lack what another has: a field must occur in one of the first five of each kind, in any of its samples.

Without --caption, the kind `alt` is: webdataset: txt, or json:caption where there are no .txt members; parquet, jsonl,
csv: the first of caption, text, alt, TEXT, alt_text, description that is there.

Books: whatever was announced or begun is given as a `Sample` or counted in a `Damage`. Reasons of `Damage`:

  damaged_tar      headers or members that cannot be read. Reading goes on at the next header in order. `samples` is the
                   difference to the `successes` of NAME_stats.json; without that file, pairs that are known by name
  decompression_bomb  the same, or rows of a parquet, where an input unpacks to more than a hundred times its size and a
                   gigabyte: the rest is not read
  fragment         a stem beyond those that NAME_stats.json announces: a torn or repeated sample, counted already
  second_member    a picture, .txt or .json of a stem that has one already (NAME.png beside NAME.jpg): left aside
  wrong_stats      NAME_stats.json that cannot be true (no number, or fewer than the pairs of a sound tar), or is a link
                   that leads out of its folder: not believed
  broken_json      a .json member that is no JSON object of up to 16 MiB; its sample is given without these fields
  damaged_parquet  the rows of a row group (or of a file) that cannot be read
  damaged_row      a line or row of a table that cannot be read. A quote in a .csv that is not closed in order costs the
                   line it stands in; a row has 1000 lines at most
"""
