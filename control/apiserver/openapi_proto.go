package apiserver

import (
	"encoding/json"

	"google.golang.org/protobuf/encoding/protowire"
)

// This file writes a Swagger 2.0 document as the protobuf message openapi.v2.Document, which kubectl asks for as
// application/com.github.proto-openapi.spec.v2@v1.0+protobuf. Only the fields that addOpenAPI makes are known: the messages are few and
// fixed, and the generated package for them would bring a YAML parser and thousands of lines for this one document. The numbers
// are those of OpenAPIv2.proto in github.com/google/gnostic-models.

// message is an encoded protobuf message in the making.
type message []byte

func (m *message) text(field protowire.Number, s any) {
	if v, ok := s.(string); ok && v != "" {
		*m = protowire.AppendTag(*m, field, protowire.BytesType)
		*m = protowire.AppendString(*m, v)
	}
}

func (m *message) texts(field protowire.Number, list any) {
	for _, v := range asList(list) {
		m.text(field, v)
	}
}

func (m *message) yes(field protowire.Number, b any) {
	if v, _ := b.(bool); v {
		*m = protowire.AppendTag(*m, field, protowire.VarintType)
		*m = protowire.AppendVarint(*m, 1)
	}
}

func (m *message) sub(field protowire.Number, inner message) {
	*m = protowire.AppendTag(*m, field, protowire.BytesType)
	*m = protowire.AppendBytes(*m, inner)
}

// named appends a message of a name (1) and a value (2): how these messages write maps.
func (m *message) named(field protowire.Number, name string, value message) {
	var n message
	n.text(1, name)
	n.sub(2, value)
	m.sub(field, n)
}

// extensions appends every x- member as its JSON text, which is YAML too.
func (m *message) extensions(field protowire.Number, of tree) {
	for _, key := range sortedKeys(of) {
		if len(key) < 2 || key[:2] != "x-" {
			continue
		}
		text, err := json.Marshal(of[key])
		if err != nil {
			continue // came out of JSON a moment ago
		}
		var value message
		value.text(2, string(text))
		m.named(field, key, value)
	}
}

func asTree(v any) tree  { t, _ := v.(tree); return t }
func asList(v any) []any { l, _ := v.([]any); return l }

func encodeSwagger(doc tree) []byte {
	var m, info, paths, definitions message
	m.text(1, doc["swagger"])
	info.text(1, asTree(doc["info"])["title"])
	info.text(2, asTree(doc["info"])["version"])
	m.sub(2, info)
	all := asTree(doc["paths"])
	for _, path := range sortedKeys(all) {
		paths.named(2, path, encodePathItem(asTree(all[path])))
	}
	m.sub(8, paths)
	schemas := asTree(doc["definitions"])
	for _, name := range sortedKeys(schemas) {
		definitions.named(1, name, encodeSchema(asTree(schemas[name])))
	}
	m.sub(9, definitions)
	return m
}

func encodePathItem(item tree) message {
	var m message
	for _, op := range []struct {
		method string
		field  protowire.Number
	}{{"get", 2}, {"put", 3}, {"post", 4}, {"delete", 5}, {"patch", 8}} {
		if o := asTree(item[op.method]); o != nil {
			m.sub(op.field, encodeOperation(o))
		}
	}
	for _, p := range asList(item["parameters"]) {
		m.sub(9, encodeParameter(asTree(p)))
	}
	return m
}

func encodeOperation(o tree) message {
	var m, responses message
	m.text(5, o["operationId"])
	m.texts(6, o["produces"])
	m.texts(7, o["consumes"])
	for _, p := range asList(o["parameters"]) {
		m.sub(8, encodeParameter(asTree(p)))
	}
	codes := asTree(o["responses"])
	for _, code := range sortedKeys(codes) {
		r := asTree(codes[code])
		var response, schema, value message
		response.text(1, r["description"])
		schema.sub(1, encodeSchema(asTree(r["schema"])))
		response.sub(2, schema)
		value.sub(1, response)
		responses.named(1, code, value)
	}
	m.sub(9, responses)
	m.extensions(13, o)
	return m
}

// encodeParameter writes a ParametersItem.
func encodeParameter(p tree) message {
	var item, parameter, m message
	switch p["in"] {
	case "body":
		m.text(2, p["name"])
		m.text(3, p["in"])
		m.yes(4, p["required"])
		m.sub(5, encodeSchema(asTree(p["schema"])))
		parameter.sub(1, m)
	default: // path and query differ in the numbers of two fields
		field, typ, unique := protowire.Number(3), protowire.Number(6), protowire.Number(20)
		if p["in"] == "path" {
			field, typ, unique = 4, 5, 19
		}
		m.yes(1, p["required"])
		m.text(2, p["in"])
		m.text(4, p["name"])
		m.text(typ, p["type"])
		m.yes(unique, p["uniqueItems"])
		var nonBody message
		nonBody.sub(field, m)
		parameter.sub(2, nonBody)
	}
	item.sub(1, parameter)
	return item
}

func encodeSchema(s tree) message {
	var m message
	m.text(1, s["$ref"])
	m.text(2, s["format"])
	m.text(4, s["description"])
	m.texts(19, s["required"])
	if more := asTree(s["additionalProperties"]); more != nil {
		var item message
		item.sub(1, encodeSchema(more))
		m.sub(21, item)
	}
	if t, ok := s["type"].(string); ok {
		var item message
		item.text(1, t)
		m.sub(22, item)
	}
	if items := asTree(s["items"]); items != nil {
		var item message
		item.sub(1, encodeSchema(items))
		m.sub(23, item)
	}
	if properties := asTree(s["properties"]); properties != nil {
		var all message
		for _, name := range sortedKeys(properties) {
			all.named(1, name, encodeSchema(asTree(properties[name])))
		}
		m.sub(25, all)
	}
	m.extensions(31, s)
	return m
}
