// Package spelling finds what a misspelt word may have meant.
package spelling
