"""Readers of images with captions, labels and second images in tars, tables and folders.

An input is a PATH or GLOB, local or in a bucket, or imagefolder:DIR. Its format is recognised by its content. A folder
means every input in it and in its subfolders; hidden files, links to folders and files of other formats are skipped. A
link that leads out of the folder is an error without --follow-links: otherwise a crafted folder could make any file of
this machine be read.

  webdataset  a .tar or .tar.gz with members NAME.jpg (.jpeg, .png, .webp, .gif, .bmp), NAME.txt, NAME.json in any
              order; other images (.tif, .avif, .heic, .jxl) are recognised, and dropped as undecodable_image.
              NAME is the key. A .parquet, .json or _stats.json of the tar's name beside it belongs to the tar.
  parquet     a table with the image's bytes in a column (jpg, jpeg, png, webp, image, img or image_bytes), or in one
              that holds {bytes, path}, as Hugging Face writes it. Rows whose `status` is "failed..." have no image.
              A column with the feature ClassLabel has the names of its classes, -1 is none.
  arrow       the same in the files of `Dataset.save_to_disk`; Arrow files that its state.json does not name are caches.
              A folder with dataset_dict.json has several splits, of which --split names one.
  imagefolder  DIR/CLASS/.../NAME.jpg, in any depth below CLASS. An image in DIR itself has no class.
  jsonl, csv  a table beside its images: `file_name` (or image, path, filename, filepath) names the image, relative
              to the table's folder and inside of it; a path or a link that leads out of it is a sample without an image
              (path_out_of_folder, link_out_of_folder), the link is followed with --follow-links. A .csv has a header,
              and commas, semicolons or tabs.

FIELD, from which --caption, --label and --keep read a text:

  webdataset  txt (the .txt member) or json:NAME (a key of the .json member)
  parquet     a column of texts, lists of texts, numbers or truth values; so for arrow
  jsonl       a key
  csv         a column
  imagefolder  class

A field of --image: for a tar the suffix of a member, such as mask.png; for parquet and arrow another column of images;
for a table a key or column with a path, as the image's; for an imagefolder the folder with NAME.png in the place of
NAME.jpg.

--split selects the files that have its name, up to the first "-" or ".", or are in a folder of that name; where there
are none, and in files that have it anyway, the rows whose field `split` (or json:split) has that value. A folder that
lacks files of a series (NAME-00001-of-00005), or of a saved dataset, is refused.

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
  no_image_file  another file of an imagefolder's class, or a link to a folder: ignored
  damaged_arrow  the rows of a batch whose offsets or texts are damaged; the rest of a stream that is cut (0 samples,
                   since it does not say how many there were)
  damaged_parquet  the rows of a row group (or of a file) that cannot be read
  damaged_row      a line or row of a table that cannot be read. An unbalanced quote in a .csv costs only its line; a
                   row has at most 1000 lines
"""
