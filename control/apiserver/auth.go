package apiserver

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
)

// User is the name that Basic authentication asks for and that the creator annotation carries.
const User = "thaw"

// minTokenLength keeps a half-written or hand-made token file from opening the server to a guess.
const minTokenLength = 16

// LoadOrCreateToken returns the token in the file at path. If there is none, it makes one of 32 random bytes in hex (so that it
// needs no escaping in the URL of a kubeconfig) in a file that only its owner can read. The file appears whole or not at all, and of two
// processes that start at once both get the same token. A file that others can read, or with less than 16
// characters, is refused.
func LoadOrCreateToken(path string) (string, error) {
	token, err := loadToken(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return token, err
	}
	if err := createToken(path); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("create API token: %w", err)
	}
	return loadToken(path)
}

func loadToken(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("read API token: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("read API token: %s can be read by other users of this machine (mode %04o): run chmod 600 %s", path, info.Mode().Perm(), path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read API token: %w", err)
	}
	token := bytes.TrimSpace(data)
	if len(token) < minTokenLength {
		return "", fmt.Errorf("read API token: %s has %d characters, at least %d are needed: remove it to get a new one", path, len(token), minTokenLength)
	}
	for _, c := range token {
		if c <= ' ' || c > '~' {
			return "", fmt.Errorf("read API token: %s has a character that cannot stand in a header: remove it to get a new one", path)
		}
	}
	return string(token), nil
}

// createToken writes a fresh token beside path and links it into place, which fails if somebody else was first.
func createToken(path string) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".token-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	var raw [32]byte
	rand.Read(raw[:])
	if _, err := tmp.WriteString(hex.EncodeToString(raw[:]) + "\n"); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	return os.Link(tmp.Name(), path)
}

// authenticator knows the token by its hash only.
type authenticator struct{ want [sha256.Size]byte }

func newAuthenticator(token string) authenticator {
	return authenticator{sha256.Sum256([]byte(token))}
}

// allows says whether an Authorization header carries the token: as Bearer, or as Basic with the user thaw. The time it takes does not
// depend on how much of a wrong token is right: hashes of equal length are compared.
func (a authenticator) allows(header string) bool {
	scheme, credentials, ok := strings.Cut(header, " ")
	if !ok {
		return false
	}
	credentials = strings.TrimSpace(credentials)
	switch {
	case strings.EqualFold(scheme, "Bearer"):
		return a.is(credentials)
	case strings.EqualFold(scheme, "Basic"):
		raw, err := base64.StdEncoding.DecodeString(credentials)
		if err != nil {
			return false
		}
		user, password, ok := strings.Cut(string(raw), ":")
		return ok && a.is(password) && user == User
	}
	return false
}

func (a authenticator) is(token string) bool {
	got := sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(got[:], a.want[:]) == 1
}

// refuse answers 401 and says how to authenticate.
func refuse(w http.ResponseWriter, r *http.Request) {
	w.Header().Add("WWW-Authenticate", `Basic realm="thaw", charset="UTF-8"`)
	w.Header().Add("WWW-Authenticate", `Bearer realm="thaw"`)
	writeError(w, r, fail(http.StatusUnauthorized, reasonUnauthorized,
		"Unauthorized: send the token as a bearer token, or as the password of user %s; it stands in the file token of the server's data directory", User))
}

// CheckListen refuses an address that other machines can reach, unless allowRemote says that this is meant. The host must be localhost or a
// loopback address: an empty host and 0.0.0.0 mean all interfaces.
func CheckListen(addr string, allowRemote bool) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("address %q: %w", addr, err)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return fmt.Errorf("address %q: %w", addr, err)
	}
	if allowRemote || strings.EqualFold(host, "localhost") {
		return nil
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() {
		return nil
	}
	return fmt.Errorf("address %q can be reached from other machines, and nothing that is sent there is encrypted, tokens included: take 127.0.0.1, or allow it with --allow-remote", addr)
}
