"""
What exists: the names of a data set, as an SQLite catalogue of directories and objects.

`opening` makes an index of a data set and its sources. `live` lists lazily, directory by directory, and
believes a listing for its TTL; `snapshot` makes, opens, compares and removes pinned catalogues;
`manifest` turns JSON lines of URLs into one. `index` is what they all offer to the layers above.

Below them: `database` holds the schema, the connections and the SQL; `building` makes a pinned catalogue
of a stream of objects; `remembered` is the entries in memory in front of it; `names` maps keys to file
names and back (pure), `layout` the mount points of a data set to directories (pure); `walking` is paths,
for any index.
"""
