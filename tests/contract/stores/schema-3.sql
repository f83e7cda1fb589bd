BEGIN TRANSACTION;
CREATE TABLE experience (
	alias VARCHAR NOT NULL, 
	"key" VARCHAR NOT NULL, 
	resting BOOLEAN NOT NULL, 
	measured JSON NOT NULL, 
	PRIMARY KEY (alias)
);
INSERT INTO "experience" VALUES('b','k',1,'{"w1": {"start": [2.5, 3.0]}}');
CREATE TABLE keys (
	id VARCHAR NOT NULL, 
	digest VARCHAR NOT NULL, 
	spec JSON NOT NULL, 
	created INTEGER NOT NULL, 
	revoked INTEGER, 
	PRIMARY KEY (id), 
	UNIQUE (digest)
);
INSERT INTO "keys" VALUES('key-1','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','{"name": "alice", "models": ["b"], "requests_per_minute": 60, "tokens_per_minute": null, "max_concurrency": null, "priority": 0}',1700000003,NULL);
INSERT INTO "keys" VALUES('key-2','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','{"name": "bob", "models": [], "requests_per_minute": null, "tokens_per_minute": null, "max_concurrency": null, "priority": 0}',1700000004,1700000005);
CREATE TABLE meta (
	name VARCHAR NOT NULL, 
	value INTEGER NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "meta" VALUES('schema',3);
INSERT INTO "meta" VALUES('epoch',3);
CREATE TABLE models (
	alias VARCHAR NOT NULL, 
	spec JSON NOT NULL, 
	created INTEGER NOT NULL, 
	PRIMARY KEY (alias)
);
INSERT INTO "models" VALUES('org/a','{"alias": "org/a", "model_name": "org/model", "max_model_len": 4096, "gpu_memory_gb": 7.5, "engine_args": {"dtype": "bfloat16"}}',1700000001);
INSERT INTO "models" VALUES('b','{"alias": "b", "engine": "fake", "min_replicas": 2, "fake": true, "fake_response": "hi"}',1700000002);
CREATE TABLE workers (
	worker_id VARCHAR NOT NULL, 
	url VARCHAR NOT NULL, 
	PRIMARY KEY (worker_id)
);
INSERT INTO "workers" VALUES('w1','http://10.0.0.1:7000');
COMMIT;
