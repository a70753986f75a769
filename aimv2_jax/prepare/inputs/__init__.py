"""Readers of image-text pairs in tars, tables and folders.

An input is a PATH or GLOB, local or in a bucket. Its format is recognised by its content. A folder means every input in
it and in its subfolders; hidden files, links to folders and files of other formats are skipped. A link that leads out
of the folder is an error without --follow-links: otherwise a crafted folder could make any file of this machine be
read.

  webdataset  a .tar or .tar.gz with members NAME.jpg (.jpeg, .png, .webp, .gif, .bmp), NAME.txt, NAME.json in any
              order; other images (.tif, .avif, .heic, .jxl) are recognised, and dropped as undecodable_image.
              NAME is the key. A .parquet, .json or _stats.json of the tar's name beside it belongs to the tar.
  parquet     a table with the image's bytes in a column (jpg, jpeg, png, webp, image, img or image_bytes), or in one
              that holds {bytes, path}, as Hugging Face writes it. Rows whose `status` is "failed..." have no image.
  jsonl, csv  a table beside its images: `file_name` (or image, path, filename, filepath) names the image, relative
              to the table's folder and inside of it; a link that leads out of it is a sample without an image
              (link_out_of_folder), or followed with --follow-links. A .csv has a header, and commas, semicolons or
              tabs.

FIELD, from which --caption, --label and --keep read a text:

  webdataset  txt (the .txt member) or json:NAME (a key of the .json member)
  parquet     a column of texts, lists of texts, numbers or truth values
  jsonl       a key
  csv         a column

Shards may have different fields: a field must occur in one of the first five shards of each format, in any sample.

Without --caption, the kind `alt` is: webdataset: txt, or json:caption if there are no .txt members; parquet, jsonl,
csv: the first existing one of caption, text, alt, TEXT, alt_text, description.

Every sample that an input announces or begins is returned as a `Sample` or counted in a `BadInput`. Its reasons:

  damaged_tar      headers or members that cannot be read. Reading continues at the next valid header. `samples` is the
                   difference to the `successes` of NAME_stats.json; without that file, pairs that are known by name
  decompression_bomb  the same, or rows of a parquet, if an input unpacks to more than a hundred times its size and a
                   gigabyte: the rest is not read
  fragment         a stem beyond those that NAME_stats.json announces: a torn or repeated sample, counted already
  second_member    an image, .txt or .json of a stem that has one already (NAME.png beside NAME.jpg): ignored
  wrong_stats      a NAME_stats.json that cannot be true (no number, or fewer than the pairs of an undamaged tar), or a
                   link that leads out of its folder: ignored
  broken_json      a .json member that is not a JSON object of up to 16 MiB; its sample has no JSON fields
  damaged_parquet  the rows of a row group (or of a file) that cannot be read
  damaged_row      a line or row of a table that cannot be read. An unbalanced quote in a .csv costs only its line; a
                   row has at most 1000 lines
"""
